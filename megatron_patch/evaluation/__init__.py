"""What a trained model is measured with: exact answers, error rates, batched greedy generation."""
