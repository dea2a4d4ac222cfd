"""What benchmarks/quality.py is made of: contestants, mixers of the study alone, tasks, one cell's training."""
