"""Our attention in lm-eval."""
