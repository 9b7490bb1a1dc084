from loader import copy_stream, to_device
