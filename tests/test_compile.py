"""``torch.compile`` of the model, and ``torch.export`` of its halves."""
