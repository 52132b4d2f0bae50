"""A1's blanks and their wrong answers. The fields are blank.py's."""
from course.bank.blank import Blank, at

HOG = "tests/test_hog.py"
MAETOK = "tests/test_maetok.py"


def hidden(*names):
    """Node ids of hidden tests."""
    return at("course/hidden/a1.py", *names)


BLANKS = (
    Blank("A1.1", "maetok.py", "patchify", "Sec. 3.1", 8,
          "the same values as `F.unfold`, put back by `unpatchify`; a size that does not fit is refused",
          at(MAETOK, "test_patchify_agrees_with_unfold_and_is_invertible",
              "test_images_that_patches_do_not_fill_are_refused"),
          hidden("test_patchify"),
          "Split H into (H/P, P) and W into (W/P, P) with reshape, permute the six axes, then merge.",
          (("channels before rows and columns", "permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)"),
           ("patches column by column", "permute(0, 2, 4, 3, 5, 1)", "permute(0, 4, 2, 3, 5, 1)"),
           ("rows and columns swapped within a patch", "permute(0, 2, 4, 3, 5, 1)",
            "permute(0, 2, 4, 5, 3, 1)"),
           ("reshape alone", "x.permute(0, 2, 4, 3, 5, 1).reshape", "x.reshape"),
           ("refuses only if neither side fits", "if H % P or W % P", "if H % P and W % P"))),
    Blank("A1.2", "maetok.py", "rotate", "Sec. 3.1", 8,
          "the product of two complex numbers; the dtype of x is kept",
          at(MAETOK, "test_rotation_is_multiplication_by_a_complex_number"),
          hidden("test_rotate"),
          "The pair (a, b) is the complex number a + ib; multiply it by cos + i sin.",
          (("the other way round", "a * cos - b * sin, a * sin + b * cos",
            "a * cos + b * sin, b * cos - a * sin"),
           ("neighbours as pairs", "a, b = x.float().chunk(2, dim=-1)",
            "a, b = x.float()[..., ::2], x.float()[..., 1::2]"),
           ("a sign lost", "a * sin + b * cos", "a * sin - b * cos"),
           ("float32 for inputs of any dtype", ".to(x.dtype)", ""),
           ("heads halved instead of channels", "chunk(2, dim=-1)", "chunk(2, dim=1)"))),
    Blank("A1.3", "maetok.py", "RoPE2D.forward", "Sec. 3.1", 12,
          "the angles of each row and column, on grids that are not square; angle 0 for all other tokens",
          at(MAETOK, "test_rope_rotates_image_tokens_by_the_documented_angles_and_leaves_the_others"),
          hidden("test_rope_angles"),
          "Number the image tokens 0 ... N-1: the column is the remainder by `columns`, the row the "
          "quotient. The first half of the pairs takes the column, the second half the row. F.pad puts zeros "
          "after the angles.",
          (("rows for columns", "(index % columns)[:, None], (index // columns)[:, None]",
            "(index // columns)[:, None], (index % columns)[:, None]"),
           ("counts by rows instead of columns", "(index % columns)[:, None], (index // columns)[:, None]",
            "(index % rows)[:, None], (index // rows)[:, None]"),
           ("the other tokens first", "(0, 0, 0, others)", "(0, 0, others, 0)"),
           ("the other tokens get no angles at all", "angle = F.pad(angle, (0, 0, 0, others))", "pass"),
           ("positions start at 1", "col * self.freqs", "(col + 1) * self.freqs"))),
    Blank("A1.4", "hog.py", "sobel", "Sec. 3.2", 10,
          "a correlation with the kernel and its transpose; signs; borders by reflection",
          at(HOG, "test_sobel_signs_and_padding", "test_sobel_is_a_correlation_with_the_kernel"),
          hidden("test_sobel"),
          "F.conv2d computes a correlation; treat the channels as a batch, or use groups.",
          (("signs of a convolution", "return gx, gy", "return -gx, -gy"),
           ("gx and gy swapped", "return gx, gy", "return gy, gx"),
           ("borders of zeros", 'mode="reflect"', 'mode="constant"'),
           ("borders repeated", 'mode="reflect"', 'mode="replicate"'),
           ("Prewitt's kernel", ".add_(s(1, 0), alpha=2).sub_(s(1, 2), alpha=2)",
            ".add_(s(1, 0)).sub_(s(1, 2))"))),
    Blank("A1.5", "hog.py", "gaussian_window", "Sec. 3.2", 4,
          "size, deviation, centre and sum, for several cell sizes",
          at(HOG, "test_window_is_the_16_pixel_gaussian"),
          hidden("test_gaussian_window"),
          "The centre of 16 pixels lies between the 8th and the 9th. The 2D window is an outer product.",
          (("as large as one cell", "size = 2 * cell_size", "size = cell_size"),
           ("sum not 1", " / w.sum() ** 2", ""),
           ("centred on a pixel", "(size - 1) / 2", "size // 2"),
           ("half the deviation", "(i / cell_size) ** 2", "(i / (cell_size / 2)) ** 2"),
           ("the factor 1/2 of the exponent forgotten", "-0.5 * (i", "-1.0 * (i"))),
    Blank("A1.6", "hog.py", "hog_features", "Sec. 3.2", 18,
          "the definition as a loop over pixels; unit cells, flat images at 0; float32 inside; sizes that do "
          "not fit",
          at(HOG, "test_equals_the_pixel_loop", "test_every_cell_has_unit_norm_and_flat_images_are_zero",
              "test_computed_in_float32_from_bfloat16_images_too", "test_sizes_that_do_not_fit_are_refused"),
          hidden("test_hog_features"),
          "The bin is floor(atan2(gx, gy) / pi * bins) mod bins. scatter_add_ fills the histogram of a cell. "
          "Gradients below 1e-5 are rounding: set them to 0. The window is tiled over the image.",
          (("signed orientation", ".div_(math.pi)", ".div_(2 * math.pi)"),
           ("the angle from the other axis", "gx.atan2_(gy)", "gy.atan2_(gx)"),
           ("no Gaussian window", "magnitude *= window[:H, :W]", "pass"),
           ("cells not normalised", "histogram = F.normalize(histogram, dim=-1)", "pass"),
           ("cells normalised to sum 1", "F.normalize(histogram, dim=-1)",
            "F.normalize(histogram, p=1, dim=-1)"),
           ("bins last", "permute(0, 2, 4, 1, 6, 3, 5)", "permute(0, 2, 4, 1, 3, 5, 6)"),
           ("computed in the images' dtype", "sobel(images.float())", "sobel(images)"),
           ("rounding taken for gradients", "F.threshold_(torch.hypot(gx, gy), 1e-5, 0.0)",
            "torch.hypot(gx, gy)")),
          ("A1.4", "A1.5")),
)
