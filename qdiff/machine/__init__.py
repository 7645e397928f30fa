"""The machine's CPU and memory, and checks of networks on the meta device."""
