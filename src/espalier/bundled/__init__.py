"""What ships with the package: the seedling model, and text that every Python has, cut into data sets."""
