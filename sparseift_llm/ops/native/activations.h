// The functions between the products of a feed-forward block and their derivatives, for all lanes of a vector at once.
// Each is applied to ROWS rows of a panel, where the sums of a product have just been completed.
#pragma once

#include "kernels.h"

// As kernels/native.py numbers them.
enum Activation : int64_t { GELU_TANH, GELU_ERF, SILU, RELU, RELU_SQUARED, NUM_ACTIVATIONS };

template <class Kernels>
struct Activations {
    typedef typename Kernels::Vector Vector;
    typedef typename Kernels::Total Sum;
    static constexpr int LANES = Kernels::LANES, BYTES = sizeof(Vector);
    static constexpr int64_t COUNT = Kernels::ROWS * Kernels::PANEL;  // numbers that one call takes
    struct Point {
        Vector value, slope;
    };

    static inline Vector cut(Vector x, Sum low, Sum high) {  // nan stays nan
        x = x < low ? Vector{} + low : x;
        return x > high ? Vector{} + high : x;
    }

    // exp(z) to one or two units in the last place; z is cut to where floats do not overflow.
    static inline Vector exponential(Vector z) {
        if constexpr (std::is_same_v<Sum, float>) {
            typedef int32_t Bits __attribute__((vector_size(BYTES)));
            z = cut(z, -87.0f, 88.0f);
            const Vector shifted = z * 1.44269504f + 12582912.0f;  // rounds to an integer, held in the low bits
            const Vector n = shifted - 12582912.0f;
            const Vector r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
            Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
            p = p * r + 8.3334519073e-3f;
            p = p * r + 4.1665795894e-2f;
            p = p * r + 1.6666665459e-1f;
            p = p * r + 5.0000001201e-1f;
            p = p * r * r + r + 1.0f;
            return p * (Vector)(((Bits)shifted - 0x4b400000 + 127) << 23);
        } else {
            for (int lane = 0; lane < LANES; lane++) z[lane] = exp(z[lane]);
            return z;
        }
    }

    // GELU with the tanh formula is x * s with s = sigmoid(2 sqrt(2 / pi) * (x + 0.044715 x^3)).
    // Beyond 64, s is 0 or 1 to the last bit. x is cut there, so that its powers do not overflow.
    static inline Point gelu_tanh(Vector h) {
        const Vector x = cut(h, -64, 64);
        const Vector s =
            1 / (1 + exponential(x * (Sum(-1.5957691216057308) - Sum(1.5957691216057308 * 0.044715) * x * x)));
        const Vector slope = Sum(1.5957691216057308) + Sum(3 * 1.5957691216057308 * 0.044715) * x * x;
        return {h * s, s + x * s * (1 - s) * slope};
    }

    // The exact GELU is x * c(x), where c is the normal distribution: c(-|x|) = exp(-x^2 / 2) * p(1 / (1 + 0.21 |x|))
    // with a polynomial p that was fitted to 1.3e-8 of each value up to 13.2. Beyond, c is 0 or 1.
    static inline Point gelu_erf(Vector h) {
        const Vector x = cut(h, -14, 14), bell = exponential(x * x * Sum(-0.5));
        Vector c;
        if constexpr (std::is_same_v<Sum, float>) {
            const Vector size = x < 0 ? -x : x, t = 1 / (1 + 0.21f * size);
            Vector p = t * -0.0722766f + 0.28665218f;
            p = p * t - 0.33672353f;
            p = p * t + 0.3570224f;
            p = p * t - 0.09939464f;
            p = p * t + 0.1273185f;
            p = p * t + 0.06852735f;
            p = p * t + 0.08516922f;
            p = p * t + 0.08370514f;
            const Vector tail = size > 13.0f ? Vector{} : bell * p * t;
            c = x < 0 ? tail : 1 - tail;
        } else {
            for (int lane = 0; lane < LANES; lane++) c[lane] = erfc(x[lane] * -0.7071067811865476) / 2;
        }
        return {h * c, c + x * bell * Sum(0.3989422804014327)};
    }

    static inline Point silu(Vector h) {
        const Vector s = 1 / (1 + exponential(-h));
        return {h * s, s + h * s * (1 - s)};
    }

    template <Activation name>
    static inline Point at(Vector h) {
        if constexpr (name == GELU_TANH) return gelu_tanh(h);
        else if constexpr (name == GELU_ERF) return gelu_erf(h);
        else if constexpr (name == SILU) return silu(h);
        const Vector positive = h < 0 ? Vector{} : h;  // nan stays nan
        if constexpr (name == RELU) return {positive, h <= 0 ? Vector{} : Vector{} + 1};
        else return {positive * positive, 2 * positive};
    }

    // Call `run` with the function as a constant of the compiler: one decision for all numbers of a call.
    template <class Run>
    static inline void with(Activation name, Run run) {
        if (name == GELU_TANH) run(std::integral_constant<Activation, GELU_TANH>());
        else if (name == GELU_ERF) run(std::integral_constant<Activation, GELU_ERF>());
        else if (name == SILU) run(std::integral_constant<Activation, SILU>());
        else if (name == RELU) run(std::integral_constant<Activation, RELU>());
        else run(std::integral_constant<Activation, RELU_SQUARED>());
    }

    // h = f(h), and times `factor` if there is one.
    static inline void forward(Activation name, int64_t count, Sum* h, const Sum* factor) {
        with(name, [&](auto f) {
            for (int64_t i = 0; i < count; i += LANES) {
                Vector* const to = (Vector*)(h + i);
                const Vector value = at<decltype(f)::value>(*to).value;
                *to = factor ? value * *(const Vector*)(factor + i) : value;
            }
        });
    }

    // From the gradient of the activation: h becomes f(h), and grad_h the gradient of h.
    static inline void backward(Activation name, const Sum* grad, Sum* h, Sum* grad_h) {
        with(name, [&](auto f) {
            for (int64_t i = 0; i < COUNT; i += LANES) {
                const Point point = at<decltype(f)::value>(*(const Vector*)(h + i));
                *(Vector*)(grad_h + i) = *(const Vector*)(grad + i) * point.slope;
                *(Vector*)(h + i) = point.value;
            }
        });
    }

    // The same for f(gate) * h: h becomes that product.
    static inline void backward_gated(Activation name, const Sum* grad, Sum* h, const Sum* gate, Sum* grad_h,
                                      Sum* grad_gate) {
        with(name, [&](auto f) {
            for (int64_t i = 0; i < COUNT; i += LANES) {
                const Point point = at<decltype(f)::value>(*(const Vector*)(gate + i));
                const Vector g = *(const Vector*)(grad + i), up = *(const Vector*)(h + i);
                *(Vector*)(grad_h + i) = g * point.value;
                *(Vector*)(grad_gate + i) = g * up * point.slope;
                *(Vector*)(h + i) = point.value * up;
            }
        });
    }
};
