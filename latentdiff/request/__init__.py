"""What a user asks for: the options, the check of their names and values, and the plan that is made of them."""
