"""Metal kernels: their source, their launch, and the check at first use."""
