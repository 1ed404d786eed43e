"""What compression costs in answers: tasks, the real engine over policies and budgets, and the report."""
