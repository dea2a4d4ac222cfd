"""Training in little device memory: what it needs can wait in host memory, or be computed again.

Each part works alone, on any ``nn.Module``.
"""
