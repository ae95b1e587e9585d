"""Derivatives: curvature, gradients of single examples, agreement of three ways."""
