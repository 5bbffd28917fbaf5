"""V1 native module names."""
