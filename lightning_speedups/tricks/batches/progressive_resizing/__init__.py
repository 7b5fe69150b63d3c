"""Small images first, and full ones at the end: the trick and its parts."""
