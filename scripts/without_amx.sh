#!/usr/bin/env bash
# without_amx.sh RELEASE CPUINFO: the flags that keep this release of gcc from using AMX on this processor, if it breaks it.
# gcc's bug 114098: half of the configuration of AMX's tiles is optimized away, and llama.cpp's first product of a
# quantized weight ends the process. Mended in 11.5, 12.4, 13.3 and 14.1.
set -euo pipefail
case ${1%%.*} in
    none) exit 0 ;;
    11) mended=11.5 ;; 12) mended=12.4 ;; 13) mended=13.3 ;; 14) mended=14.1 ;; *) mended=11 ;;
esac
oldest=$(printf '%s\n' "$1" "$mended" | sort -V | head -n 1)
if grep -qs amx_tile "$2" && [ "$1" != "$mended" ] && [ "$oldest" = "$1" ]; then
    echo "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
fi
