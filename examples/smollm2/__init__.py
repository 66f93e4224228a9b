"""What the examples with a pretrained language model are made of: weights, text, training."""
