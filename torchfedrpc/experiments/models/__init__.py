"""Small models for small images. Any other ``torch.nn.Module`` can be used instead."""
