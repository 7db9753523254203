"""The losses. ``interface`` defines their inputs and outputs, ``registry`` lists them."""
