"""Looking at masks and runs."""
