"""Export to a directory that transformers.js runs as it is, in Node and in browsers."""
