"""Dispatch and combine between the GPUs of one host, through CUDA IPC and kernels of our own."""
