"""emblas inside other libraries. Each submodule needs its library and is imported on demand."""
