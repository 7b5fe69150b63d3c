"""The only room that touches Lightning's private parts, one file for each grip."""
