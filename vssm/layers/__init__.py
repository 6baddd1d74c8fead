"""What two or more model families are built from."""
