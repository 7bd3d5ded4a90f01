"""One row of a file as rows of our own: `table` lists the forms that are recognised by their keys."""
