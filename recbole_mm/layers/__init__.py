"""Generic ``nn.Module`` blocks: plain arguments, never a config."""
