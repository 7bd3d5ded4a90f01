"""Models and the parts they play: policy, reference, reward model, critic."""
