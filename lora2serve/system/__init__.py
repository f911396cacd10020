"""The machine: hardware, processes, environments of their own, HTTP; asked in one place."""
