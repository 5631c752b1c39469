def make(items):
    """Return the count of the odd numbers in items. Use a loop."""
    found = 0
    for k in items:
        if <|hole|>
            found += 1
    return found
