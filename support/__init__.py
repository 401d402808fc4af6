"""What the method stands on: kernels, files, processes, pictures and videos."""
