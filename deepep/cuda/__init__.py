"""What the CUDA backends share: compiling and loading kernels, launching them, the driver API."""
