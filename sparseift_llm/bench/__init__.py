"""What dense layers and their sparse twins cost in time and memory, measured side by side."""
