"""What a developer runs from the checkout; not installed with the package."""
