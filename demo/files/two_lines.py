def make(items):
    """Return the count of the odd numbers in items. Use a loop."""
    found = 0
    for k in items:
<|hole:24|>    return found
