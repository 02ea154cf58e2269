"""`transduce bench`: load on a running server, and what it did to it. Knows the server by its HTTP contract alone."""
