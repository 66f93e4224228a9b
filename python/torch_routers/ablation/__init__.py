"""The router comparison that ships: ``python -m torch_routers.ablation --help``.

The same small transformer language model is trained on real text once per row (a router, or a
dense layer to compare with), on the same batches, from the same initialisation of all shared
parts. It uses the public ``torch_routers`` only.
"""
