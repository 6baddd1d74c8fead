"""Where models are found by name: the zoo, and what it becomes in timm."""
