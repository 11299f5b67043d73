"""What is predicted and how wrong it is: noise, target, weight; pure functions on tensors."""
