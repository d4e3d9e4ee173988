"""Curvature of a model's loss as symmetric operators: Hessian, Gauss-Newton, Fisher."""
