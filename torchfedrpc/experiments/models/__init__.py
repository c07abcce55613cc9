"""Small models for small images; any ``torch.nn.Module`` will do in their place."""
