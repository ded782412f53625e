"""From options and statistics to a plan: candidates, their costs, and the choice within a budget."""
