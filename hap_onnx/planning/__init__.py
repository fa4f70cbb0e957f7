"""From sensitivities and budgets to a plan: losses, costs, and the choice of least loss."""
