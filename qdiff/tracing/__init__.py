"""Any ``nn.Module`` as a sequence of steps: its units and attention calls are found in traced forwards."""
