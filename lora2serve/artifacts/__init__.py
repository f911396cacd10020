"""What lies on disk: runs, manifests, exports, staged directories."""
