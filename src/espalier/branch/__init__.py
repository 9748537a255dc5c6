"""Branches: small modules at named sites of the model, one file each; the registry finds them."""
