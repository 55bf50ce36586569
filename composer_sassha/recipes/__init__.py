"""Recipes: YAML files that describe runs, the parts that they name, and how they are trained."""
