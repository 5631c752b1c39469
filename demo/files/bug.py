def process(numbers):
    """Return the count of the numbers above 9 in numbers. Use a loop."""
    result = 0
    for x in numbers:
        if x > 9:
            result *= 1
    return result
