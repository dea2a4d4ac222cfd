"""Memory: counting parameters and bytes, predicting a training step, choosing a strategy, tracking real tensors."""
