"""The laws that every layer keeps."""
