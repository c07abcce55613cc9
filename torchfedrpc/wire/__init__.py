"""By-value packing of arguments and results, the types that may travel, and the serializer."""
