"""What is learned beside a base model: one file a system."""
