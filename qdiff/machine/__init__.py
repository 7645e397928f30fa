"""Memory of the machine, and checks of networks on the meta device."""
