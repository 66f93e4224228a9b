"""What ``minilm_multitask.py`` is made of: text, encoder, methods, training, report."""
